"""Checkpoint folders: what they contain, how they are written without a bad moment, how they are believed."""
