"""A worker of a comparison that knows the tests' network, data and backend."""

from __future__ import annotations

from passdeploy.compare.parallel import main
from tests import scripted

assert scripted.STEP

if __name__ == "__main__":
    main()
