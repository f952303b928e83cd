"""A shop made with Oscar, where guests and customers check out."""
