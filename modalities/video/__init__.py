"""Video: decoding, frame sampling, encoders and augmentation."""
