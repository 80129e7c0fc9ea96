"""What the API and the portal read: one module for each subject, each function a bounded number of queries."""
