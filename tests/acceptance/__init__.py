"""What :mod:`tests.real_host` is made of: an installed WebUI, random models for it, and cases to drive it through."""
