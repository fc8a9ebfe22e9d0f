"""Everything that chooses bitrate levels."""
