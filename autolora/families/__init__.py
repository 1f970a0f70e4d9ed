"""Base models behind one seam: what differs between them is in `autolora.families.base.Family`."""
