"""How ranks are arranged: the arithmetic of layouts and the process groups they become."""
