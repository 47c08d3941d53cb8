"""Tables, figures and pages made of measured rows."""
