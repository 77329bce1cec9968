"""The small real model of the demo: its data set, its networks, and the training that makes its files.

Training needs torch and numpy alone.
"""
