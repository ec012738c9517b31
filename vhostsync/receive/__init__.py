# SPDX-License-Identifier: Apache-2.0
"""`vhostsync receive`: a disk of this host, for one owner on another host, with a fence."""
