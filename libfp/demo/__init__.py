"""What `fp demo` shows: the router at work, in namespaces with real traffic, or over memory ports without root."""
