"""nnU-Net trainers, one a file; found by nnU-Net through the environment variable ``nnUNet_extTrainer``."""
