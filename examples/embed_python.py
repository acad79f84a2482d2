"""Ask a bundle about an image: python examples/embed_python.py BUNDLE IMAGE QUESTION"""

import sys

from masters.runtime import load

vlm = load(sys.argv[1])
for piece in vlm.stream(sys.argv[3], images=[sys.argv[2]]):
    print(piece, end="", flush=True)
print()
