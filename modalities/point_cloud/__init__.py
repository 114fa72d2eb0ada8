"""Point clouds and meshes: decoding, grouping, encoders and augmentation."""
