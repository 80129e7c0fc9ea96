"""What the pages read: one module for each subject, each function a bounded number of queries."""
