"""What a folder says of itself on the Hub, and how it gets there."""
