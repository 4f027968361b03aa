"""What runs models: the native library, sessions, calls and training steps, and what is installed here."""
