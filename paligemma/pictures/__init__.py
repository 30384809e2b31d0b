"""Picture files: reading them safely, fetching them from the web, and folders of a million of them."""
