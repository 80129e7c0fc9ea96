"""Who speaks: the market's keys and certificates, and the credentials of people, programs and sites."""
