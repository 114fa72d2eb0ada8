"""Time series: decoding, encoders and augmentation."""
