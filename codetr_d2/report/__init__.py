"""Pages that people open: computed apart from shown, one file each, without network."""
