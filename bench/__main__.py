# SPDX-License-Identifier: Apache-2.0
import sys

from bench.compare import main

sys.exit(main())
