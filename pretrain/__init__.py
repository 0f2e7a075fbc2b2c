"""Student and teacher on shards: networks, objective, loop, export."""
