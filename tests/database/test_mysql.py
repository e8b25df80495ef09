"""MariaDB and MySQL: what they must be set to, and what a deadlock leaves behind."""
