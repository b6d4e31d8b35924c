"""The API's endpoints, a router each for images, models, the catalog, operations and the page."""
