"""The daemon that keeps quantised KV caches and answers attention with a certificate."""
