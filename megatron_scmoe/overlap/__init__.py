"""When the routed path acts beside the backbone, and how its tokens travel meanwhile."""
