"""One file for each dialect: it translates requests into the router's terms, and what comes back into its own."""
