"""Sound: decoding, encoders of waveforms and spectrograms, augmentation."""
