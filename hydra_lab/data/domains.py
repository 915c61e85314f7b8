"""The names of the domains; a sample's domain number is its place in `DOMAINS`."""

DOMAINS = ("code", "technical", "prose", "arithmetic", "chains", "recall", "facts", "structured")
NATURAL_DOMAINS = ("code", "technical", "prose")
