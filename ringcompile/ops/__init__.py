"""Our operators: their schemas, and the bodies that run each on one rank."""
