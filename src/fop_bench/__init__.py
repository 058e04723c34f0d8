"""Measurements of FOP against SGD, AdamW and K-FAC; needs the extra `fop-optim[bench]`."""
