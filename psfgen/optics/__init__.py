"""What a ray does, independent of any store."""
