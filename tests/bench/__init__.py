"""What an image prompt costs: whole UNet steps of true size with and without one, and the baselines beside ours.

    python dev.py bench           on the CPU: SD1.5 at 256 x 256
    python dev.py bench --gpu     on the GPU: SDXL at 1024 x 1024 and SD1.5 at 512 x 512

Weights are random; what a step costs doesn't depend on them. README.md beside this file says what was measured.
"""
