"""Pictures: decoding, encoders and augmentation."""
