"""From config sections to parts."""
