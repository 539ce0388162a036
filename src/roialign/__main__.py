import sys

from roialign.cli import main

sys.exit(main())
