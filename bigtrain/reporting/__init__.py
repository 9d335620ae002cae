"""What people watch: a run read from its directory, as it grows or after the fact, on a terminal or as a page.

Nothing here imports torch: `bigtrain top` starts at once, also on a login node.
"""
