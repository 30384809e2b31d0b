"""The tokens that PaliGemma adds to Gemma's vocabulary: <image>, 1024 locations and 128 mask codes. This file imports only re.

In an answer, one object is four locations (y_min, x_min, y_max, x_max), then sixteen mask codes if it has a mask, then its label:

    <loc0102><loc0204><loc0511><loc0818> cat           <loc0102><loc0204><loc0511><loc0818><seg007>...<seg090> cat

Source: google-research/big_vision, configs/proj/paligemma/README.md. Checked in tests/test_vocabulary.py.
"""

import re

IMAGE_TOKEN = "<image>"
NUM_LOCATIONS, NUM_CODES = 1024, 128
LOCATIONS_PER_BOX, CODES_PER_MASK = 4, 16
LOCATION_TOKENS = [f"<loc{i:04d}>" for i in range(NUM_LOCATIONS)]
CODE_TOKENS = [f"<seg{i:03d}>" for i in range(NUM_CODES)]
# Matches exactly the tokens above, not <loc1024>. Group 1 is the number of a location, group 2 the number of a mask code.
LOCATION_OR_CODE = re.compile("<loc(0[0-9]{3}|10[01][0-9]|102[0-3])>|<seg(0[0-9]{2}|1[01][0-9]|12[0-7])>")
IGNORE_INDEX = -100  # the label of a token that the loss skips, as in torch and transformers
