"""The functions that operators need. Commands are thin over them."""
