"""The vocabulary's two tables kept off the device."""
