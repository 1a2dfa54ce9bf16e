"""Published methods, each a small policy over the layers and the ops."""
