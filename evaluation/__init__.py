"""Attack a trained nnU-Net model and report what it withstands."""
