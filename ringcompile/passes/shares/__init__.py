"""From global shapes and layouts to one rank's share, and moves between layouts."""
