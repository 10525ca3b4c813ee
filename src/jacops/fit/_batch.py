"""The call for many problems of one shape."""
