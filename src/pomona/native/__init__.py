"""The compiled part: where the library is, and its only binding."""
