"""What a server keeps for its clients between requests, and the frames they exchange."""
