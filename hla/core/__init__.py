"""The definitions: algebra, passes, programs and forms, written once against the Array API."""
