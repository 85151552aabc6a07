"""Reading a model by the plain lens or a fitted one."""
