"""What the tests of quantized weights share: every format with every group size."""

FORMATS = [
    ("int8", None),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
    ("int4_asymmetric", 32),
    ("int4_asymmetric", 64),
    ("int4_asymmetric", 128),
    ("nf4", None),
]
