"""The studio: a page in the browser, and an HTTP API, over one `pipeline.UnCLIP`; see docs/studio.md."""
