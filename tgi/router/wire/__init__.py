"""The wire: JSON bodies of requests and answers, one file for each family of routes. Types only."""
