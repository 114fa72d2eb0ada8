"""Text: encoders and views. README.md in this folder lists them."""
