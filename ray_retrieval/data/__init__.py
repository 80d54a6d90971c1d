"""Images: tables, decoding, preprocessing and augmentation, splits and benchmarks."""
